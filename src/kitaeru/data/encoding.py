"""Text that is not UTF-8: which encoding it probably is, and the command that converts it."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

from kitaeru.errors import DataError
from kitaeru.i18n import tr

SAMPLE_BYTES = 1 << 16
_BOMS = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
_JIS_ESCAPES = (b"\x1b$B", b"\x1b$@", b"\x1b(J")
_READERS = {".gz": "zcat", ".zst": "zstdcat"}


def is_iso_2022_jp(line: bytes) -> bool:
    """Whether `line`, valid UTF-8 though it is, holds the escapes of ISO-2022-JP (JIS)."""
    return b"\x1b" in line and any(escape in line for escape in _JIS_ESCAPES)


def guess_encoding(sample: bytes) -> str | None:
    """The probable encoding of `sample`, by the name iconv knows; None for UTF-8 with a few damaged bytes."""
    for bom, name in _BOMS:
        if sample.startswith(bom):
            return name
    if is_iso_2022_jp(sample):
        return "ISO-2022-JP"
    if _damaged_utf8(sample):
        return None
    score, name = max((_japanese_share(sample, codec), codec) for codec in ("CP932", "EUC-JP"))
    return name if score > 0.5 else None


def encoding_error(path: str, line: int, sample: bytes) -> DataError:
    """The error for a file whose `line` is not UTF-8; `sample` are the bytes from that line on."""
    name = guess_encoding(sample)
    where = f"{path}:{line}"
    if name is None:
        return DataError(
            tr("This line is not valid UTF-8: some of its bytes are damaged."),
            where=where,
            remedy=tr("Find them with: {command}", command=f"iconv -f UTF-8 -t UTF-8 {shlex.quote(path)} > /dev/null"),
        )
    return DataError(
        tr("The file is not UTF-8; it is probably {encoding}.", encoding=name),
        where=where,
        remedy=tr("Convert it with: {command}", command=_convert_command(path, name)),
    )


def _convert_command(path: str, encoding: str) -> str:
    source = Path(path)
    reader = _READERS.get(source.suffix)
    plain = source.with_suffix("") if reader else source
    target = shlex.quote(str(plain.with_name(f"{plain.stem}.utf8{plain.suffix}")))
    quoted = shlex.quote(path)
    if reader:
        return f"{reader} {quoted} | iconv -f {encoding} -t UTF-8 > {target}"
    return f"iconv -f {encoding} -t UTF-8 {quoted} > {target}"


def _damaged_utf8(sample: bytes) -> bool:
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    other = sum(character > "\x7f" for character in text)
    # Another encoding read as UTF-8 is nearly all U+FFFD; damaged UTF-8 has a few.
    return other > 0 and text.count("\ufffd") < 0.1 * other


def _japanese_share(sample: bytes, codec: str) -> float:
    """Share of the characters beyond ASCII that are ordinary Japanese; 0 when `sample` cannot be `codec`.

    Half-width katakana do not count: they are what EUC-JP looks like when read as CP932.
    """
    try:
        text = codecs.getincrementaldecoder(codec)("strict").decode(sample)
    except UnicodeDecodeError:
        return 0.0
    other = [character for character in text if character > "\x7f"]
    usual = sum("\u3000" <= character <= "\u9fff" or "\uff01" <= character <= "\uff5e" for character in other)
    return usual / len(other) if other else 0.0
