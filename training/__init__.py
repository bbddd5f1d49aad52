"""What makes the models that millpond ships. Outside the package: whoever runs a model needs none of it."""
