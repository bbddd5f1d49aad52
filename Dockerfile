# From wheels only: `MILLPOND_PREBUILD=1 pip wheel --no-deps -w dist .` first, then `docker build -t millpond .`
FROM python:3.11-slim
COPY constraints.txt dist/*.whl /wheels/
RUN pip install --no-cache-dir --only-binary :all: -c /wheels/constraints.txt /wheels/*.whl && rm -r /wheels
RUN useradd --create-home watcher
USER watcher
ENV HF_HUB_OFFLINE=1
ENTRYPOINT ["millpond"]
