"""Recordings as sequences of samples."""

import struct
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

SUFFIXES = (".wav", ".flac", ".ogg")


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
            while len(block := file.read(size or -1, dtype="float32")):
                yield block
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{name} cannot be read as sound: {str(error).strip()}") from None


def _missing_bytes(path: Path) -> int:
    """Bytes of samples that a WAV file announces and has not, which the library passes over; 0 for other files."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return 0
        file.seek(12)
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":
                unknown = length >= 0xFFFFFFFF - 0xFF  # written while it was recorded
                return 0 if unknown else max(0, file.tell() + length - size)
            file.seek(length + length % 2, 1)
    return 0


def wav_blocks(stream: BinaryIO, rate: int, size: int) -> Iterator[NDArray[np.float32]]:
    """As sound_blocks, of 16-bit WAV that comes in, such as on standard input."""
    try:
        with wave.open(stream, "rb") as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise InputError("the sound on standard input must be WAV of one channel and 16 bits")
            if file.getframerate() != rate:
                raise InputError(f"the sound on standard input has {file.getframerate()} samples a second, not {rate}")
            while data := file.readframes(size):
                yield np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / np.float32(32768)
    except (wave.Error, EOFError) as error:
        raise InputError(f"what is on standard input is no WAV: {error}") from None


def sound_rate(path: str | Path) -> int:
    """Samples a second of a recording.

    Raises:
        InputError: it cannot be read.
    """
    soundfile = _library()
    try:
        return int(soundfile.info(str(path)).samplerate)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path} cannot be read as sound: {str(error).strip()}") from None


def _library() -> Any:
    try:
        import soundfile
    except ImportError:
        raise InputError("reading sound needs soundfile: pip install 'megalodon-lm[sound]'") from None
    return soundfile
