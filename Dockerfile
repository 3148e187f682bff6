# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target cuda -t kitaeru:cuda .      the CUDA runtime comes with torch's wheels, the driver from the host
#   docker build --target cpu -t kitaeru:cpu .        no GPU; --build-arg TORCH_INDEX_URL=… takes torch from an index of
#                                                     CPU builds (pytorch.org names it), which saves some 5 GB

ARG DEBIAN=12.12-slim

# --- Python, the same in every stage ---------------------------------------------------------------------------------
FROM debian:${DEBIAN} AS python
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 LANG=C.UTF-8
# Debian keeps no old versions of a package: its release is what is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# --- the libraries, which change less often than kitaeru -------------------------------------------------------------
FROM python AS libraries
ARG TORCH_INDEX_URL=""
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/kitaeru \
    && python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['prometheus'], sep='\n')" > requirements.txt \
    && /opt/kitaeru/bin/pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
        --constraint constraints.txt --requirement requirements.txt

# --- kitaeru ---------------------------------------------------------------------------------------------------------
FROM python AS wheel
WORKDIR /build
COPY pyproject.toml constraints.txt LICENSE NOTICE README.md ./
COPY src src
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-deps --wheel-dir /wheels --constraint constraints.txt .

FROM python AS runtime
RUN groupadd --gid 1000 kitaeru \
    && useradd --uid 1000 --gid kitaeru --create-home kitaeru \
    && mkdir -p /cache /work/runs \
    && chown -R kitaeru:kitaeru /cache /work
ENV PATH=/opt/kitaeru/bin:$PATH HF_HOME=/cache/huggingface KITAERU_CACHE=/cache/kitaeru TRITON_CACHE_DIR=/cache/triton
COPY --from=libraries /opt/kitaeru /opt/kitaeru
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/kitaeru/bin/pip install --no-deps /wheels/*.whl
WORKDIR /work
# Only looks: it leaves the GPUs to the run beside it.
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["kitaeru", "doctor", "--quick"]
ENTRYPOINT ["kitaeru"]
CMD ["--help"]

# --- what is built ---------------------------------------------------------------------------------------------------
FROM runtime AS cpu
USER 1000:1000

FROM runtime AS cuda
# Triton compiles the launchers of its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
