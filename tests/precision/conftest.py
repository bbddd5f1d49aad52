from pathlib import Path

import pytest

from tests.precision.models import quantized


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized tiny model; not to be written to."""
    return quantized(tmp_path_factory.mktemp("precision") / "stored")
