"""What pyproject.toml cannot say: the wheel carries the course, which in the repository lies beside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def course_files() -> list[Path]:
    """What MANIFEST.in includes: the notebooks, and every page and picture that their links lead to."""
    lines = Path("MANIFEST.in").read_text(encoding="utf-8").splitlines()
    patterns = [pattern for line in lines if line.startswith("include ") for pattern in line.split()[1:]]
    return sorted({path for pattern in patterns for path in Path().glob(pattern)})


class BuildWithCourse(build_py):
    """Puts the course into the package as `wejepa/course_files/`, where wejepa.course finds it."""

    def run(self):
        super().run()
        if self.editable_mode:  # the package stays where it is, and so does the course
            return
        files = course_files()
        if not any(path.suffix == ".ipynb" for path in files):
            raise SystemExit("error: notebooks/ holds no notebooks, and the wheel would be without them: build from the whole repository")
        for path in files:
            copy = Path(self.build_lib, "wejepa", "course_files", path)
            self.mkpath(str(copy.parent))
            self.copy_file(str(path), str(copy))


setup(cmdclass={"build_py": BuildWithCourse})
