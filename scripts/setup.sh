#!/usr/bin/env bash
# Make a virtual environment with kitaeru (editable) and its tested libraries in it. Usage: setup.sh FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:?usage: setup.sh FOLDER}

# The language of the locale, by the same rule as kitaeru.i18n; the catalogue is not there yet.
locale=${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}
say() { if [[ $locale == ja* ]]; then echo "$2"; else echo "$1"; fi; }

runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

if [[ -d $venv ]] && ! { runs "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
  say "$venv does not work (any more): making it anew." "$venv が動作しないため、作り直します。"
  rm -rf "$venv"
fi

if [[ ! -d $venv ]]; then
  found='' without_venv='' too_old=''
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
    if runs "$candidate"; then
      if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        found=$candidate
        break
      fi
      without_venv=${without_venv:-$(version "$candidate")}
    else
      too_old=${too_old:-$(version "$candidate" || true)}
    fi
  done
  if [[ -z $found ]]; then
    if [[ -n $without_venv ]]; then
      say "Python $without_venv is here without its venv module. Install it, then run make again:
  sudo apt-get install python$without_venv-venv" \
        "Python $without_venv はありますが、venv モジュールがありません。次のコマンドで入れてから、もう一度 make を実行してください:
  sudo apt-get install python$without_venv-venv"
    else
      say "kitaeru needs Python 3.11 or newer; found: ${too_old:-none}.
Debian 12 and Ubuntu 24.04 or newer: sudo apt-get install python3 python3-venv
Already installed elsewhere:         make setup PYTHON=/path/to/python3" \
        "kitaeru には Python 3.11 以降が必要です（見つかったもの: ${too_old:-なし}）。
Debian 12、Ubuntu 24.04 以降: sudo apt-get install python3 python3-venv
別の場所にある場合:           make setup PYTHON=/path/to/python3"
    fi >&2
    exit 1
  fi
  say "Making $venv with Python $(version "$found")." "Python $(version "$found") で $venv を作ります。"
  "$found" -m venv "$venv"
fi

say "Installing kitaeru and its libraries (a gigabyte or more the first time)." \
  "kitaeru とライブラリを入れます（初回は 1 GB 以上をダウンロードします）。"
# In a terminal pip shows how far a download is; in a log that is only noise.
quiet=--quiet
[[ -t 1 ]] && quiet=''
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
  --constraint constraints.txt --editable '.[dev]'
say "Ready: $("$venv/bin/python" --version), torch $("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')." \
  "準備ができました: $("$venv/bin/python" --version)、torch $("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')。"
