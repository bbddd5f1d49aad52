"""Minnow's vocabulary, chat format and codes."""

from __future__ import annotations

import pytest
import torch

from millpond.eval.streams import LEVELS, generate
from millpond.eval.streams.drawing import OBJECTS
from millpond.eval.streams.events import label_grid
from millpond.models.chat import Chat
from training.minnow.architecture import Codes, configuration, name_words, tokenizer
from training.minnow.language import layout, place
from training.minnow.train import build


@pytest.fixture(scope="module")
def words():  # type: ignore[no-untyped-def]
    return tokenizer()


def test_every_question_is_in_the_vocabulary_and_every_answer_is_one_token(words) -> None:  # type: ignore[no-untyped-def]
    for seed in range(60):
        for question in generate(seed, level=sorted(LEVELS)[seed % 3]).questions:
            assert words.unk_token_id not in words(question.text)["input_ids"]
            (answer,) = words(question.answer)["input_ids"]
            assert answer != words.unk_token_id
            assert words.decode([answer]) == question.answer


def test_the_trained_layout_is_what_a_session_reads_off_the_template(words) -> None:  # type: ignore[no-untyped-def]
    chat, made = Chat(words, configuration().video_token_id), layout(words)
    assert tuple(chat.before_video(None)) == made.before
    for question in generate(4, level="hard").questions:
        if question.earlier is None:
            ids, targets = made.turn(question)
            assert ids[:-1] == chat.after_video(question.text)
            assert [t for t in targets if t != -100] == [ids[-1], words.eos_token_id]
            assert len(ids) == len(targets)


def test_two_turns_are_laid_out_as_a_session_goes_on(words) -> None:  # type: ignore[no-untyped-def]
    chat, made = Chat(words, configuration().video_token_id), layout(words)
    question = next(q for q in generate(4).questions if q.earlier)
    assert question.earlier is not None
    first, answer = question.earlier
    ids, _ = made.turn(question)
    expected = [*chat.after_video(first), *words(answer)["input_ids"], *chat.next_turn(question.text)]
    assert ids[:-1] == expected


def test_codes_are_orthonormal_and_always_the_same() -> None:
    codes = Codes.make()
    stacked = torch.cat([codes.kind, codes.colour, codes.digit, codes.cell])
    assert torch.allclose(stacked @ stacked.T, torch.eye(len(stacked)), atol=1e-5)
    assert torch.equal(stacked, torch.cat([*(getattr(Codes.make(), n) for n in ("kind", "colour", "digit", "cell"))]))


def test_embedded_labels_are_sums_of_codes() -> None:
    codes = Codes.make()
    labels = torch.full((1, 16, 3), -1)
    labels[0, 3] = torch.tensor([2, 4, -1])
    labels[0, 7] = torch.tensor([8, -1, 6])
    seen = codes.embed(labels)[0]
    assert torch.allclose(seen[0], codes.cell[0])
    assert torch.allclose(seen[3], codes.cell[3] + codes.kind[2] + codes.colour[4])
    assert torch.allclose(seen[7], codes.cell[7] + codes.kind[8] + codes.digit[6])


def test_words_for_things_start_as_their_codes(words) -> None:  # type: ignore[no-untyped-def]
    table, codes = torch.nn.Embedding(len(words), 128), Codes.make()
    before = table.weight.detach().clone()
    name_words(table, words, codes)
    for index, name in enumerate(OBJECTS):
        assert torch.equal(table.weight[words.convert_tokens_to_ids(name)], codes.kind[index])
    corner = table.weight[words.convert_tokens_to_ids("bottom-right")] @ codes.cell.T
    assert (corner > 0.1).nonzero().flatten().tolist() == [10, 11, 14, 15]
    untouched = words.convert_tokens_to_ids("where")
    assert torch.equal(table.weight[untouched], before[untouched])


def test_the_first_layer_starts_by_taking_over_what_a_named_thing_shows() -> None:
    model, codes, words = build(0), Codes.make(), tokenizer()
    stream = next(s for seed in range(50) if (s := generate(seed, groups=8, level="plain")).events[0].kind == 3)
    star = stream.events[0]
    language = model.model.language_model
    video = codes.embed(torch.from_numpy(label_grid(stream.events, 8))).reshape(1, -1, 128)
    word = language.embed_tokens(torch.tensor([[words.convert_tokens_to_ids("star")]]))
    at = place(torch.arange(8).repeat_interleave(16), torch.arange(16).repeat(8), 4)
    positions = torch.cat([at, (at.max() + 1).expand(3, 1)], dim=1)[:, None]
    seen: list[torch.Tensor] = []
    hook = language.layers[0].self_attn.register_forward_hook(lambda _, __, out: seen.append(out[0][0, -1]))
    with torch.no_grad():
        language(inputs_embeds=torch.cat([video, word], dim=1), position_ids=positions, use_cache=False)
    hook.remove()
    assert int((codes.colour @ seen[0]).argmax()) == star.colour
    assert int((codes.cell @ seen[0]).argmax()) in star.cells
