"""The texts for analyses that were given none."""

from tl_asymmetry.models.calibration import calibration_texts


def test_calibration_texts_are_many_and_different():
    texts = calibration_texts()
    assert len(texts) >= 40
    assert sum(len(text.encode()) for text in texts) >= 32_000
    assert all(300 <= len(text) <= 1500 for text in texts)
    lines = [line for text in texts for line in text.splitlines() if len(line) > 60]
    assert len(set(lines)) == len(lines)
