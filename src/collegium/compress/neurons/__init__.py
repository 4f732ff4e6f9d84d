"""Neuron scores, what each neuron of each expert is worth, and plans that keep the best of them."""

from collegium.compress.neurons import scores
from collegium.compress.neurons.plan import Mode, plan_neurons
from collegium.compress.neurons.registry import NeuronScore, find_neuron_score, neuron_score, neuron_scores

__all__ = ["Mode", "NeuronScore", "find_neuron_score", "neuron_score", "neuron_scores", "plan_neurons", "scores"]
