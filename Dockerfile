# One image for every part of the product; compose.yaml gives each container its command.
#
# This image was NOT built on the machine it was written on, which has no container engine. What could be checked without one:
# tests/integration/test_compose_file.py holds this file and compose.yaml to each other.

FROM python:3.13-slim-trixie AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src

# pip stays behind in this stage: it installs into the environment from outside.
RUN python -m venv --without-pip /opt/lookup

# The dependencies first, because they change less often than the code. Wheels only: no compiler is needed, here or below.
COPY requirements.lock ./
RUN pip --python /opt/lookup/bin/python install --require-hashes --only-binary=:all: -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY domain domain
COPY events events
COPY projections projections
COPY read_side read_side
COPY results results
COPY workers workers
COPY write_side write_side
RUN pip --python /opt/lookup/bin/python install --no-deps .


FROM python:3.13-slim-trixie

# The number is fixed because compose.yaml gives this group the right to open ICMP sockets.
RUN groupadd --system --gid 10001 lookup \
 && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin lookup \
 # A volume takes over whose folder it is mounted on.
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/lookup /var/lib/lookup-segments

COPY --from=build /opt/lookup /opt/lookup

ENV PATH=/opt/lookup/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONFAULTHANDLER=1

# The only place that a read-only container may write to.
WORKDIR /tmp
USER 10001:10001
EXPOSE 8081 8082
STOPSIGNAL SIGTERM
# Every part has a health check of its own in compose.yaml.
HEALTHCHECK NONE
CMD ["lookup", "--help"]
