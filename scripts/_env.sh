# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv hold what this checkout needs, and nothing twice.
#   ensure_env base|dev     afterwards $ROOT/.venv/bin has the commands
# Works from any folder and under `set -euo pipefail`; installs only when the dependency files changed.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"

say() { printf '%s\n' "$*" >&2; }

# Prints the command of the first Python that is new enough, stable choice first.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    # Run it: a pyenv shim exists for versions that are not there.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
  done
  say "error: MeshInfer needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true)"
  say "  hint: on Debian or Raspberry Pi OS 12 and later: apt install python3 python3-venv"
  return 1
}

# What an install depends on; the path too, since a moved .venv does not work.
env_fingerprint() {
  local text
  text="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt")" || return 1
  printf '%s\n%s\n' "$ROOT" "$text" | sha256sum | cut -d ' ' -f 1
}

create_venv() {
  local python
  python="$(find_python)" || return 1
  say "creating .venv with $("$python" --version)"
  rm -rf "$VENV" || return 1
  if ! "$python" -m venv "$VENV" >&2; then
    rm -rf "$VENV"
    say "error: $python cannot create a virtual environment"
    say "  hint: apt install python3-venv"
    return 1
  fi
}

# Whether .venv works here: not broken, and not moved or copied along with the checkout.
is_usable() {
  grep -qF -- "$VENV" "$VENV/bin/activate" 2>/dev/null \
    && "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

is_installed() { # base|dev, fingerprint
  [[ -x "$VENV/bin/python" && "$(cat "$VENV/.installed-$1" 2>/dev/null)" == "$2" ]]
}

install_env() { # base|dev; called in a subshell, under the lock
  local kind="$1" fingerprint target=.
  fingerprint="$(env_fingerprint)" || return 1
  if is_installed "$kind" "$fingerprint"; then return 0; fi
  if ! is_usable; then create_venv || return 1; fi
  if [[ "$kind" == dev ]]; then target='.[dev]'; fi
  say "installing MeshInfer ($kind) into .venv; the first time takes a minute, and dev's torch and Ray more"
  cd "$ROOT" || return 1 # the caller's own folder stays: this is a subshell
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    --constraint constraints.txt --editable "$target" >&2 || return 1
  printf '%s\n' "$fingerprint" >"$VENV/.installed-base" || return 1
  if [[ "$kind" == dev ]]; then printf '%s\n' "$fingerprint" >"$VENV/.installed-dev"; fi
}

ensure_env() {
  # The lock is the checkout's own folder: nothing to create, nothing left behind.
  (
    if command -v flock >/dev/null 2>&1; then flock 9; fi
    install_env "$1"
  ) 9<"$ROOT"
}
