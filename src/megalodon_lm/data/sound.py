"""Recordings as sequences of samples."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

SUFFIXES = (".wav", ".flac", ".ogg")
UNKNOWN_LENGTH = 0x7FFFEF00  # bytes; what is announced while a recording goes on is about so many (sox) or more
UNKNOWN_FRAMES = (1 << 63) - 1  # as soundfile has them


def read_sound(path: str | Path, rate: int) -> NDArray[np.float32]:
    """The samples of a recording of one channel, from -1 to 1.

    Args:
        path: of a file that soundfile can read, such as WAV.
        rate: samples a second that it must have; 0 for any.

    Raises:
        InputError: missing, damaged, empty, of another rate or of several channels; or soundfile is not installed.
    """
    blocks = list(sound_blocks(path, rate))
    return np.concatenate(blocks)


def sound_blocks(path: str | Path, rate: int, size: int = 0) -> Iterator[NDArray[np.float32]]:
    """The samples of a recording in blocks; errors as of read_sound.

    Args:
        path, rate: see read_sound.
        size: samples of a block; 0 for one of all.
    """
    soundfile, name = _library(), str(path)
    try:
        with soundfile.SoundFile(name) as file:
            if file.channels != 1:
                raise InputError(f"{name} has {file.channels} channels; mix it down to one")
            if rate and file.samplerate != rate:
                raise InputError(f"{name} has {file.samplerate} samples a second, not {rate}; resample it")
            if missing := _missing_bytes(Path(name)):
                raise InputError(f"{name} is truncated: {missing:,} bytes of its samples are missing; copy it again")
            if not file.frames:
                raise InputError(f"{name} holds no samples")
            if file.frames == UNKNOWN_FRAMES:  # FLAC, which the library cannot read to its end then
                raise InputError(f"{name} does not say how many samples it has; convert it to WAV")
            left = file.frames
            while len(block := file.read(size or -1, dtype="float32")):
                left -= len(block)
                if not np.isfinite(block).all():
                    raise InputError(f"{name} holds samples that are no numbers")
                yield block
            if left > 0:
                raise InputError(f"{name} is truncated: {left:,} of its samples are missing; copy it again")
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> InputError:
    """In one line; the library says the same of a missing file and of a folder."""
    path = Path(name)
    why = str(error).strip().removeprefix(f"Error opening {name!r}: ").replace("\n", " ")
    if not path.exists():
        why = "there is no such file"
    elif not path.is_file():
        why = "it is a folder, not a file" if path.is_dir() else "it is no file"
    return InputError(f"{name} cannot be read as sound: {why}")


def _missing_bytes(path: Path) -> int:
    """Bytes of samples that a WAV file announces and has not, which the library passes over; 0 for other files."""
    size, large = path.stat().st_size, 0
    with open(path, "rb") as file:
        if file.read(4) not in (b"RIFF", b"RF64"):
            return 0
        file.seek(12)
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":
                if large and length == 0xFFFFFFFF:
                    return max(0, file.tell() + large - size)
                # written while it was recorded, or to a pipe
                unknown = UNKNOWN_LENGTH <= length <= 1 << 31 or length >= 0xFFFFFFFF - 0xFF
                return 0 if unknown else max(0, file.tell() + length - size)
            if name == b"ds64" and len(lengths := file.read(16)) == 16:  # of RF64: what 32 bits cannot hold
                large = struct.unpack("<8xQ", lengths)[0]
                length -= 16
            file.seek(length + length % 2, 1)
    return 0


def wav_blocks(stream: BinaryIO, rate: int, size: int) -> Iterator[NDArray[np.float32]]:
    """As sound_blocks, of 16-bit WAV that comes in, such as on standard input, whatever its pieces.

    A header that does not know how long the sound will be, as programs write that record, ends nothing early.
    """
    channels, found, bits, announced = _wav_header(stream)
    if (channels, bits) != (1, 16):
        raise InputError(
            f"the sound on standard input has {channels} channels of {bits} bits; it must be WAV of one channel and 16 "
            "bits"
        )
    if found != rate:
        raise InputError(f"the sound on standard input has {found} samples a second, not {rate}; resample it")
    if announced == 0 or announced >= UNKNOWN_LENGTH:
        yield from pcm_blocks(stream, size)
        return
    left = announced
    while left > 1 and (data := stream.read(min(2 * size, left))):
        left -= len(data)
        if len(data) > 1:
            yield _samples(data)
    if left > 1:
        raise InputError(f"the sound on standard input is truncated: {left:,} bytes of its samples are missing")


def _wav_header(stream: BinaryIO) -> tuple[int, int, int, int]:
    """Channels, rate, bits of a sample and bytes of samples by a header, read up to the first sample.

    Raises:
        InputError: it is none, or of compressed sound.
    """
    no_wav = InputError("what is on standard input is no WAV; with --raw it is taken as samples alone")
    riff = stream.read(12)
    if len(riff) < 12 or riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise no_wav
    form: tuple[int, ...] | None = None
    while len(header := stream.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        if name == b"data":
            if form is None:
                raise no_wav
            return form[1], form[2], form[5], length
        held = stream.read(length + length % 2) if length < 1 << 20 else b""
        if name == b"fmt " and len(held) >= 16:
            form = struct.unpack("<HHIIHH", held[:16])
            kind = struct.unpack("<H", held[24:26])[0] if form[0] == 0xFFFE and len(held) >= 26 else form[0]
            if kind != 1:
                raise InputError(
                    "the sound on standard input is compressed or of floating point; it must be 16-bit WAV"
                )
    raise no_wav


def pcm_blocks(stream: BinaryIO, size: int) -> Iterator[NDArray[np.float32]]:
    """As wav_blocks, of samples that come in without a header: 16 bits, little-endian, one channel."""
    heard = 0
    while data := stream.read(2 * size):
        heard += len(data) // 2
        if len(data) > 1:
            yield _samples(data)
    if not heard:
        raise InputError("the sound on standard input holds no samples")


def _samples(data: bytes) -> NDArray[np.float32]:
    """From -1 to 1; half a sample at the end is left out."""
    return np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / np.float32(32768)


def sound_rate(path: str | Path) -> int:
    """Samples a second of a recording.

    Raises:
        InputError: it cannot be read.
    """
    soundfile = _library()
    try:
        return int(soundfile.info(str(path)).samplerate)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(str(path), error) from None


def _library() -> Any:
    try:
        import soundfile
    except ImportError:
        raise InputError("reading sound needs soundfile: pip install 'megalodon-lm[sound]'") from None
    return soundfile
