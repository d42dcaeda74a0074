"""Sound files: whole, block by block, from a pipe, cut."""

import io
import wave

import numpy as np
import pytest
import soundfile

from megalodon_lm.data.sound import read_sound, sound_blocks, wav_blocks
from megalodon_lm.errors import InputError

RATE = 1000


def write_wav(path, samples, rate=RATE, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def test_blocks_are_those_of_the_file(tmp_path):
    write_wav(tmp_path / "x.wav", np.sin(np.arange(300) / 5))
    with open(tmp_path / "x.wav", "rb") as stream:
        blocks = list(wav_blocks(stream, RATE, 64))
    assert np.array_equal(np.concatenate(blocks), read_sound(tmp_path / "x.wav", RATE))
    assert [len(b) for b in blocks] == [len(b) for b in sound_blocks(tmp_path / "x.wav", RATE, 64)]


def announcing(wav, length):
    """A WAV file whose header says another number of bytes."""
    return wav[:40] + length.to_bytes(4, "little") + wav[44:]


@pytest.mark.parametrize("length", [0x7FFFF000, 0x7FFFFF00, 0x7FFFFFDB, 1 << 31, 0xFFFFFFFF - 36, 0xFFFFFFFF])
def test_sound_that_was_recorded_into_a_pipe_is_read_to_its_end(length, tmp_path):
    """As sox, arecord and ffmpeg leave it, who cannot go back to write its length: as a file, and as it comes."""
    write_wav(tmp_path / "x.wav", np.sin(np.arange(300) / 5))
    expected = read_sound(tmp_path / "x.wav", RATE)
    wav = announcing((tmp_path / "x.wav").read_bytes(), length)
    (tmp_path / "x.wav").write_bytes(wav)
    assert np.array_equal(read_sound(tmp_path / "x.wav", RATE), expected)
    assert np.array_equal(np.concatenate(list(wav_blocks(io.BytesIO(wav), RATE, 64))), expected)


@pytest.mark.parametrize("length", [602, 1 << 20, 3 << 30])
def test_sound_that_was_cut_is_refused(length, tmp_path):
    write_wav(tmp_path / "x.wav", np.sin(np.arange(300) / 5))
    (tmp_path / "x.wav").write_bytes(announcing((tmp_path / "x.wav").read_bytes(), length))
    with pytest.raises(InputError, match=f"truncated: {length - 600:,} bytes of its samples are missing"):
        read_sound(tmp_path / "x.wav", RATE)


def test_a_large_file_that_was_cut_is_refused(tmp_path):
    tone = np.sin(np.arange(300) / 5)
    soundfile.write(tmp_path / "x.wav", tone, RATE, format="RF64", subtype="PCM_16")
    whole = (tmp_path / "x.wav").read_bytes()
    assert whole.startswith(b"RF64")
    assert len(read_sound(tmp_path / "x.wav", RATE)) == 300
    (tmp_path / "x.wav").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="truncated: 100 bytes of its samples are missing"):
        read_sound(tmp_path / "x.wav", RATE)


def test_flac_of_unknown_length_is_refused_in_words(tmp_path):
    """As encoders write it into a pipe: the number of samples, 36 bits behind 108 of the first block, is 0."""
    soundfile.write(tmp_path / "x.flac", np.sin(np.arange(3000) / 5), RATE)
    flac = bytearray((tmp_path / "x.flac").read_bytes())
    assert int.from_bytes(flac[21:26], "big") & (1 << 36) - 1 == 3000
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])
    (tmp_path / "x.flac").write_bytes(flac)
    for size in (0, 100):
        with pytest.raises(InputError, match=r"x\.flac does not say how many samples it has; convert it"):
            list(sound_blocks(tmp_path / "x.flac", RATE, size))
