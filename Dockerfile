# The server of `unimm serve`. docs/serving.md says how it is built and run.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
# PyTorch for CPUs; https://download.pytorch.org/whl/cu130 is one for NVIDIA's GPUs
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/unimm
ENV PATH=/opt/unimm/bin:$PATH PIP_NO_CACHE_DIR=1
RUN pip install --index-url ${TORCH_INDEX} torch torchvision
COPY setup.py pyproject.toml README.md LICENSE NOTICE /src/
COPY unimm /src/unimm
# triton runs on GPUs alone, and takes more space than everything else but torch
RUN pip install '/src[serve]' && case "${TORCH_INDEX}" in */cpu) pip uninstall --yes triton ;; esac

FROM ${BASE}
# the cache of downloaded models belongs to the user, so that a volume mounted there does
RUN useradd --uid 10001 --create-home unimm \
    && install --directory --owner unimm /home/unimm/.cache /home/unimm/.cache/huggingface
COPY --from=build /opt/unimm /opt/unimm
ENV PATH=/opt/unimm/bin:$PATH
USER unimm
WORKDIR /home/unimm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["unimm"]
# it does not start without keys: UNIMM_API_KEYS in the environment, or --api-key-file
CMD ["serve", "--host", "0.0.0.0", "--model", "bagel-nano"]
