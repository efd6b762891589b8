"""The device: predicts with personal adapters and trains them within a budget."""
