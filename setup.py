"""What pyproject.toml cannot say: the wheel carries the notebooks and their drawings, which in the repository lie beside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    """Puts the notebooks into the package as `wejepa/notebooks/`, where wejepa.course finds them."""

    def run(self):
        super().run()
        if self.editable_mode:  # the package stays where it is, and so do they
            return
        notebooks = sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
        if not notebooks:
            raise SystemExit("error: notebooks/ holds no notebooks, and the wheel would be without them: build from the whole repository")
        folder = Path(self.build_lib, "wejepa", "notebooks")
        self.mkpath(str(folder))
        for path in notebooks + sorted(Path("notebooks").glob("schematic-*.svg")):
            self.copy_file(str(path), str(folder / path.name))


setup(cmdclass={"build_py": BuildWithNotebooks})
