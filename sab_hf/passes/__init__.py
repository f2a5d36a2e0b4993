"""The model run block by block over the calibration set: inputs, targets, second moments, gradients."""
