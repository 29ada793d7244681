# Image of an MLflow server with PostgreSQL and object storage. `make images` builds it.
# It is configured by MLflow's own variables, so that no password stands in a command:
# MLFLOW_BACKEND_STORE_URI, MLFLOW_ARTIFACTS_DESTINATION, AWS_*, MLFLOW_SERVER_ALLOWED_HOSTS.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS base
RUN if ! command -v python3 >/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 1000 --no-create-home --home-dir /tmp mlflow

FROM base AS build
ARG PIP_NO_CACHE_DIR=1
RUN if ! python3 -c 'import ensurepip' 2>/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
ENV PATH=/opt/pip/bin:$PATH PIP_PYTHON=/opt/venv/bin/python PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-compile --only-binary :all: mlflow psycopg2-binary boto3
COPY images/prune.sh images/
RUN sh images/prune.sh /opt/venv --keep-pages \
    && { /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash \
        /opt/venv/lib || true; }

FROM base
COPY --from=build /opt/venv /opt/venv
USER 1000:1000
WORKDIR /tmp
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp MLFLOW_DISABLE_TELEMETRY=true
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
ARG VERSION=""
LABEL org.opencontainers.image.title="MLflow server for flagscale-distillation" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
