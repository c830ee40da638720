"""What a model says about its layers, and which norm each of them wants."""

from steepest.diagnosis.audit import Audit, audit
from steepest.diagnosis.audit_warnings import AuditRow, AuditWarning
from steepest.diagnosis.callbacks import hf_callback, lightning_callback
from steepest.diagnosis.diagnosis import Diagnosis, Level, MatrixDiagnosis, Prediction
from steepest.diagnosis.layer_conditions import LayerCondition, LayerConditions
from steepest.diagnosis.monitor import Monitor
from steepest.diagnosis.plan import Plan, PlanRow
from steepest.diagnosis.race import RaceResult
from steepest.diagnosis.stacks import StackDiagnosis
from steepest.diagnosis.verdicts import diagnose

__all__ = [
    "Audit",
    "AuditRow",
    "AuditWarning",
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
    "StackDiagnosis",
    "audit",
    "diagnose",
    "hf_callback",
    "lightning_callback",
]
