"""Measurements: `suite` trains with several methods, `products` times curvature products."""
