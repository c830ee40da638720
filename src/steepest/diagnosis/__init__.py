"""What a model says about its layers, and which norm each of them wants."""

from steepest.diagnosis.callbacks import hf_callback, lightning_callback
from steepest.diagnosis.diagnosis import Diagnosis, Level, MatrixDiagnosis, Prediction
from steepest.diagnosis.layer_conditions import LayerCondition, LayerConditions
from steepest.diagnosis.monitor import Monitor
from steepest.diagnosis.plan import Plan, PlanRow
from steepest.diagnosis.race import RaceResult
from steepest.diagnosis.verdicts import diagnose

__all__ = [
    "Diagnosis",
    "LayerCondition",
    "LayerConditions",
    "Level",
    "MatrixDiagnosis",
    "Monitor",
    "Plan",
    "PlanRow",
    "Prediction",
    "RaceResult",
    "diagnose",
    "hf_callback",
    "lightning_callback",
]
