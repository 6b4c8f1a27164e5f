"""What all packages share: errors, files, the console, the experiment and its stages."""
