# Two images, for any Debian base with Python 3.11 or newer: `operator` (without torch) and `trainer`.
#
#   docker build --target operator -t headrace-operator:0.1.0 .
#   docker build --target trainer  -t headrace-trainer:0.1.0 .
#
# The trainer image compiles Transformer Engine against its torch: 20 minutes on two cores. Without GPUs, skip it with
# --build-arg REQUIREMENTS=trainer.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=headrace
# Some libraries look up the current user: torch names its caches after it. $USER covers clusters that assign other uids.
RUN groupadd --gid 65532 headrace \
 && useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin headrace
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

# Triton and torch.compile need a C compiler at run time.
FROM base AS trainer-environment
RUN headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') \
 && apt-get update \
 && apt-get install --yes --no-install-recommends g++ $([ -e "$headers/Python.h" ] || echo python3-dev) \
 && rm -rf /var/lib/apt/lists/*
COPY requirements/build.txt requirements/trainer.txt requirements/
RUN python3 -m venv /opt/headrace \
 && python -m pip install --no-cache-dir --require-hashes --requirement requirements/build.txt \
 && python -m pip install --no-cache-dir --require-hashes --requirement requirements/trainer.txt
# By default its build would download a prebuilt wheel, which no hash covers.
ARG REQUIREMENTS=gpu
COPY requirements/$REQUIREMENTS.txt requirements/
RUN NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
    python -m pip install --no-cache-dir --no-build-isolation --require-hashes --requirement requirements/$REQUIREMENTS.txt
COPY --from=wheel /wheels /wheels
RUN python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
 && python -m pip uninstall --yes pip

# Not copied into a smaller image like the operator's: the compiler must stay, so nothing would be saved.
FROM trainer-environment AS trainer
USER 65532:65532
EXPOSE 9400
CMD ["python", "-m", "headrace_trainer.agent", "/etc/headrace/stage.json"]

FROM base AS operator
COPY --from=operator-environment /opt/headrace /opt/headrace
USER 65532:65532
EXPOSE 8080
CMD ["python", "-m", "headrace_operator.main"]
