"""What a training would need and how long a step of it would take, on devices that need not be there."""
