"""Every supported model type under the settings its config class allows, against transformers."""
