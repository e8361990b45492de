"""What puts the measurements together: `octavo demo`, and the evidence for the paper's tables."""
