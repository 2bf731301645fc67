"""Destinations of metrics and events: files, console, wandb, TensorBoard, MLflow, Trackio. Progress bars."""

from distft.tracker.console import ConsoleTracker
from distft.tracker.interface import HANG_EVENT, LEDGER_EVENT, Metrics, Tracker
from distft.tracker.jsonl import (
    EVALUATIONS_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    EventLog,
    JsonlTracker,
    last_logged_step,
    read_lines,
)
from distft.tracker.mlflow_tracker import MlflowConfig, MlflowTracker
from distft.tracker.progress import ProgressDisplay, progress
from distft.tracker.tensorboard_tracker import TensorBoardConfig, TensorBoardTracker
from distft.tracker.trackers import TrackerConfig, Trackers, build_trackers
from distft.tracker.trackio_tracker import TrackioConfig, TrackioTracker
from distft.tracker.wandb_tracker import WandbConfig, WandbTracker

__all__ = [
    "EVALUATIONS_FILE",
    "EVENTS_FILE",
    "HANG_EVENT",
    "LEDGER_EVENT",
    "METRICS_FILE",
    "ConsoleTracker",
    "EventLog",
    "JsonlTracker",
    "Metrics",
    "MlflowConfig",
    "MlflowTracker",
    "ProgressDisplay",
    "TensorBoardConfig",
    "TensorBoardTracker",
    "Tracker",
    "TrackerConfig",
    "Trackers",
    "TrackioConfig",
    "TrackioTracker",
    "WandbConfig",
    "WandbTracker",
    "build_trackers",
    "last_logged_step",
    "progress",
    "read_lines",
]
