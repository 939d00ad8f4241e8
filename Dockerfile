# Two images: `operator`, without torch, and `trainer`.
#
#   docker build --target operator -t headrace-operator:0.1.0 .
#   docker build --target trainer  -t headrace-trainer:0.1.0 .
#
# The trainer has Transformer Engine, which is compiled against torch: its base needs Python 3.11 or newer and CUDA's compiler
# (nvcc, cuDNN's and NCCL's headers). Without GPUs leave it out with --build-arg TRANSFORMER_ENGINE= on any base.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp

FROM base AS wheel
WORKDIR /src
COPY requirements/build.txt requirements/
RUN python3 -m venv /opt/headrace \
 && python -m pip install --no-cache-dir --require-hashes --requirement requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY operator operator
COPY trainer trainer
COPY cli cli
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base AS operator-environment
COPY requirements/operator.txt requirements/
RUN python3 -m venv /opt/headrace \
 && python -m pip install --no-cache-dir --require-hashes --requirement requirements/operator.txt
COPY --from=wheel /wheels /wheels
RUN python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
 && python -m pip uninstall --yes pip

FROM base AS trainer-environment
ARG TRANSFORMER_ENGINE=2.20.2
COPY requirements/trainer.txt requirements/build.txt requirements/
RUN python3 -m venv /opt/headrace \
 && python -m pip install --no-cache-dir --require-hashes --requirement requirements/build.txt \
 && python -m pip install --no-cache-dir --require-hashes --requirement requirements/trainer.txt
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
      python -m pip install --no-cache-dir --no-build-isolation "transformer-engine[pytorch]==$TRANSFORMER_ENGINE"; \
    fi
COPY --from=wheel /wheels /wheels
RUN python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

FROM base AS trainer
COPY --from=trainer-environment /opt/headrace /opt/headrace
USER 65532:65532
EXPOSE 9400
CMD ["python", "-m", "headrace_trainer.agent", "/etc/headrace/stage.json"]

FROM base AS operator
COPY --from=operator-environment /opt/headrace /opt/headrace
USER 65532:65532
EXPOSE 8080
CMD ["python", "-m", "headrace_operator.main"]
