"""Pictures and pages made from what a RUN holds."""
