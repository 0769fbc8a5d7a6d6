# docker build -f docker/cpu.Dockerfile -t qurl:cpu . && docker run --rm -it --shm-size 8g qurl:cpu make quickstart
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libnuma1 make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/qurl
COPY . .
RUN make setup
ENV PATH=/opt/qurl/.venv/bin:$PATH
CMD ["qurl", "doctor"]
