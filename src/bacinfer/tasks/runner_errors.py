"""What Diffusion Policy's environment runners fail with, and what it means."""

from __future__ import annotations

from pathlib import Path

_MEANINGS = {
    "has no attribute 'generate_id'": 'this wandb is too new for the runner\'s videos: pip install "wandb<0.28"',
    "'float' object has no attribute 'numerator'": "this av is too new for a video of a fractional number of frames a "
    'second: pip install "av<13"',
    "gladLoadGL error": "without a display, MuJoCo draws with MUJOCO_GL=egl set in the environment",
}


def explain(error: Exception) -> str:
    """The error's text, and, where it is known, what it means and what to do."""
    text = str(error) or repr(error)
    meaning = _meaning(error, text)
    return f"{text} ({meaning})" if meaning else text


def _meaning(error: Exception, text: str) -> str | None:
    if isinstance(error, FileNotFoundError):
        return (
            f"a relative path starts at the current directory, {Path.cwd()}: put Diffusion Policy's data there, or run "
            "from where it lies"
        )
    if isinstance(error, (ConnectionError, EOFError)):
        return "the process of an environment ended; its own error is further up"
    return next((meaning for symptom, meaning in _MEANINGS.items() if symptom in text), None)
