"""Adapters of peft on a model that is cut: LoRA's matrices are cut as the layer's they are beside."""
