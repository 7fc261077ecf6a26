"""What tools/quickstart.sh runs."""
