"""What every room uses: errors, layout, metrics, files."""
