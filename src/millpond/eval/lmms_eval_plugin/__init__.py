"""millpond as a model of lmms-eval 0.7.3: its tasks, prompts and scores, our memory. Found by the entry point group `lmms_eval.models`.

Nothing here is imported unless lmms-eval asks for it; it needs PyAV below 16 and therefore an environment of its own (`make interop`).
"""
