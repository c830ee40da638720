"""What a model says about its layers: hooks that capture, and the layerwise conditions."""

from steepest.diagnosis.layer_conditions import LayerCondition, LayerConditions

__all__ = ["LayerCondition", "LayerConditions"]
