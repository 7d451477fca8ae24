# The image of every step that trains or prepares data: Python, torch and this package.
# BASE_IMAGE may already hold torch (GPU bases do): what is in it stays as it is.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim
FROM ${BASE_IMAGE}

ARG GIT_SHA=""
ENV DARKROOM_GIT_SHA=${GIT_SHA} PYTHONUNBUFFERED=1 UV_SYSTEM_PYTHON=1 UV_BREAK_SYSTEM_PACKAGES=1

WORKDIR /opt/darkroom
COPY pyproject.toml constraints.txt images/requirements.py ./
RUN python3 -m pip install --no-cache-dir --break-system-packages uv \
 && python3 requirements.py pyproject.toml constraints.txt \
 && uv pip install --no-cache --constraint /tmp/constraints.txt --requirement /tmp/requirements.txt \
 && uv pip install --no-cache --no-deps --requirement /tmp/kfp.txt

COPY README.md LICENSE ./
COPY model_core model_core
COPY components components
COPY pipelines pipelines
RUN uv pip install --no-cache --no-deps .

USER 1000:1000
