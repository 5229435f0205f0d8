#!/bin/sh
# Installs MeshInfer on a device: wheels only, no compiler, in a virtual environment of its own.
#   sh deploy/install.sh                             from the checkout that it lies in
#   sh install.sh --from meshinfer-0.1.0-py3-none-any.whl    a wheel, a URL, or an index's name
#   sh install.sh --uninstall                        it, and its services; keys and models stay
# As root into /opt/meshinfer, else into ~/.local/share/meshinfer, with a link on the PATH; or into
# --prefix, without. Again is an upgrade. Of several Pythons: --python. Exit codes: 0, 2 usage,
# 75 try again (the network), 78 not on this system; the text says what to do.
set -eu

usage() { sed -n '2,8p' "$0" 2>/dev/null | sed 's/^# \{0,1\}//'; }
say() { printf '%s\n' "$*" >&2; }
fail() { # code, text, hint
  say "error: $2"
  if [ -n "${3:-}" ]; then say "  hint: $3"; fi
  exit "$1"
}

from='' prefix='' python='' uninstall=no
while [ $# -gt 0 ]; do
  case "$1" in
    --from | --prefix | --python)
      [ $# -ge 2 ] || fail 2 "$1 needs a value" "sh install.sh --help"
      case "$1" in --from) from=$2 ;; --prefix) prefix=$2 ;; *) python=$2 ;; esac
      shift 2
      ;;
    --uninstall) uninstall=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail 2 "$1 means nothing" "sh install.sh --help" ;;
  esac
done

if [ -n "$prefix" ]; then
  commands=''
elif [ "$(id -u)" = 0 ]; then
  prefix=/opt/meshinfer commands=/usr/local/bin
else
  [ -n "${HOME:-}" ] || fail 78 "there is no home folder" "set HOME, or give --prefix"
  prefix=${XDG_DATA_HOME:-$HOME/.local/share}/meshinfer commands=$HOME/.local/bin
fi
case "$prefix" in
  /*) ;;
  *) prefix=$(pwd)/$prefix ;;
esac
mark=$prefix/.meshinfer-install # what has it is ours to replace and to remove

# --- removing

remove() {
  if [ ! -e "$mark" ]; then
    if [ -e "$prefix" ]; then fail 78 "$prefix was not made by this script" "give --prefix"; fi
    say "nothing is installed at $prefix"
    return
  fi
  for unit in meshinfer-worker.service meshinfer-coordinator.service; do
    file=/etc/systemd/system/$unit
    if [ "$(id -u)" = 0 ] && grep -qsF "$prefix/bin/meshinfer" "$file"; then
      if [ -d /run/systemd/system ]; then systemctl disable --now "$unit" || true; fi
      rm -f "$file"
      say "removed $unit"
    fi
  done
  link=$commands/meshinfer
  if [ -n "$commands" ] && [ "$(readlink "$link" || true)" = "$prefix/bin/meshinfer" ]; then
    rm -f "$link"
  fi
  rm -rf "$prefix"
  say "removed $prefix"
  if [ "$(id -u)" = 0 ]; then
    say "kept: /var/lib/meshinfer-* (keys, models), /etc/meshinfer (token, settings)"
  else
    say "kept: ${XDG_STATE_HOME:-$HOME/.local/state}/meshinfer (keys, models)"
  fi
}

# --- may it be here?

check_system() {
  system=$(uname -s) machine=$(uname -m)
  [ "$system" = Linux ] || fail 78 "MeshInfer runs on Linux, and this is $system"
  bits=$(getconf LONG_BIT 2>/dev/null || echo 64)
  if [ "$bits" = 32 ]; then
    fail 78 "this system is 32-bit ($machine): MeshInfer needs a 64-bit one" \
      "flash Raspberry Pi OS (64-bit); Pi 3, Pi 4, Pi 5 and Zero 2 W all run it"
  fi
  case "$machine" in
    aarch64 | arm64 | x86_64) ;;
    armv[67]*l | i?86) fail 78 "this system is 32-bit ($machine): MeshInfer needs a 64-bit one" \
      "flash Raspberry Pi OS (64-bit); Pi 3, Pi 4, Pi 5 and Zero 2 W all run it" ;;
    *) fail 78 "onnxruntime has no wheels for $machine" "use an aarch64 or x86_64 machine" ;;
  esac
}

# Of the Python given: new enough, CPython, 64-bit, with glibc of at least 2.28? Says what is wrong.
judge_python() {
  "$1" - <<'EOF'
import platform, struct, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d: MeshInfer needs 3.11 or newer" % sys.version_info[:2])
if platform.python_implementation() != "CPython":
    sys.exit("is %s, not CPython" % platform.python_implementation())
if struct.calcsize("P") != 8:
    sys.exit("is 32-bit (%s): MeshInfer needs a 64-bit system" % sysconfig.get_platform())
name, version = platform.libc_ver()
if name != "glibc":
    sys.exit("is linked to %s, not to glibc: the engine has no wheels for it" % (name or "musl"))
if tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
    sys.exit("has glibc %s: the engine's wheels need 2.28 or newer" % version)
EOF
}

find_python() {
  why=''
  # The system's own first: its packages keep it up to date.
  for each in ${python:-python3 python3.13 python3.12 python3.11}; do
    command -v "$each" >/dev/null 2>&1 || continue
    if said=$(judge_python "$each" 2>&1); then
      python=$(command -v "$each")
      return
    fi
    why="${why:+$why; }$each $(printf '%s' "$said" | tail -n 1)"
  done
  fail 78 "no Python here will do: ${why:-there is none}" \
    "64-bit Raspberry Pi OS or Debian, 12 or newer: apt install python3 python3-venv"
}

# --- installing

make_environment() {
  if [ -e "$prefix" ] && [ ! -e "$mark" ]; then
    [ -z "$(ls -A "$prefix")" ] \
      || fail 78 "$prefix is there, and not ours" "give --prefix, or move it"
  fi
  wanted=$("$python" -c 'import sys; print(sys.version)')
  have=$("$prefix/bin/python" -c 'import sys; print(sys.version)' 2>/dev/null || true)
  if [ "$have" = "$wanted" ] && "$prefix/bin/python" -m pip --version >/dev/null; then return; fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null \
    || fail 78 "$python cannot make a virtual environment" "apt install python3-venv"
  { rm -rf "$prefix" && mkdir -p "$prefix"; } 2>/dev/null \
    || fail 78 "cannot make $prefix" "give --prefix, or run it as root"
  : >"$mark"
  "$python" -m venv "$prefix" || fail 78 "$python cannot make a virtual environment at $prefix" \
    "is there room on the disk? df -h $prefix"
}

# A checkout is pure Python: its wheel is made of a copy, and without a compiler.
copy_of_checkout() {
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
  (cd "$from" && cp -R pyproject.toml README.md LICENSE meshinfer cluster "$copy")
}

install_wheels() {
  pip="$prefix/bin/python -m pip --disable-pip-version-check --no-input"
  what=$from
  if [ -d "$from" ]; then copy_of_checkout && what=$copy; fi
  if ! $pip install --quiet --upgrade --only-binary :all: "$what"; then
    fail 75 "pip did not install $from; its own words are above" \
      "is the network there? then run this again: it goes on where it was"
  fi
  if ! "$prefix/bin/python" -c 'import numpy, onnxruntime, zmq' >/dev/null 2>&1; then
    fail 78 "onnxruntime does not start on this processor" "$prefix/bin/meshinfer doctor says more"
  fi
}

link_command() {
  if [ -z "$commands" ]; then return; fi
  mkdir -p "$commands"
  if [ -e "$commands/meshinfer" ] && [ ! -L "$commands/meshinfer" ]; then
    say "note: $commands/meshinfer is there, and not ours; use $prefix/bin/meshinfer"
    return
  fi
  ln -sfn "$prefix/bin/meshinfer" "$commands/meshinfer"
  case ":$PATH:" in
    *":$commands:"*) ;;
    *) say "note: $commands is not on the PATH; log in again, or use $prefix/bin/meshinfer" ;;
  esac
}

if [ "$uninstall" = yes ]; then
  remove
  exit 0
fi
check_system
find_python
if [ -z "$from" ]; then
  from=$(dirname "$0")/..
  [ -f "$from/pyproject.toml" ] \
    || fail 2 "there is no checkout around $0: what is to be installed?" \
      "sh install.sh --from FILE.whl, a URL, or a name that your package index knows"
  from=$(cd "$from" && pwd -P)
fi
make_environment
say "installing $from into $prefix with $("$python" --version); on a Pi this takes some minutes"
install_wheels
link_command
say "installed $("$prefix/bin/meshinfer" --version)"
say "next: meshinfer coordinator; on the others meshinfer worker --token TOKEN"
