"""What the scripts beside this folder are made of; nobody types a path in here."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the project
