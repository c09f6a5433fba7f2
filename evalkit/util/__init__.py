"""What every part of evalkit uses: settings, files, statistics, products."""
