# docker build -f docker/gpu.Dockerfile -t qurl:gpu . && docker run --rm -it --gpus all --shm-size 32g qurl:gpu qurl doctor
# The development image: vLLM and DeepSpeed compile kernels with nvcc at run time.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libnuma1 make python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/qurl
COPY requirements requirements
RUN python3.12 -m venv .venv && .venv/bin/pip install --no-cache-dir --no-deps -r requirements/gpu.lock
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation -e .
ENV PATH=/opt/qurl/.venv/bin:$PATH
CMD ["qurl", "doctor"]
