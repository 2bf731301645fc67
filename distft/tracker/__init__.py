"""Destinations of a run's metrics and events: files, console, wandb, TensorBoard. Progress of long work."""

from distft.tracker.console import ConsoleTracker
from distft.tracker.interface import HANG_EVENT, LEDGER_EVENT, Metrics, Tracker
from distft.tracker.jsonl import (
    EVENTS_FILE,
    METRICS_FILE,
    EventLog,
    JsonlTracker,
    last_logged_step,
    read_lines,
)
from distft.tracker.progress import ProgressDisplay, progress
from distft.tracker.tensorboard_tracker import TensorBoardConfig, TensorBoardTracker
from distft.tracker.trackers import TrackerConfig, Trackers, build_trackers
from distft.tracker.wandb_tracker import WandbConfig, WandbTracker

__all__ = [
    "EVENTS_FILE",
    "HANG_EVENT",
    "LEDGER_EVENT",
    "METRICS_FILE",
    "ConsoleTracker",
    "EventLog",
    "JsonlTracker",
    "Metrics",
    "ProgressDisplay",
    "TensorBoardConfig",
    "TensorBoardTracker",
    "Tracker",
    "TrackerConfig",
    "Trackers",
    "WandbConfig",
    "WandbTracker",
    "build_trackers",
    "last_logged_step",
    "progress",
    "read_lines",
]
