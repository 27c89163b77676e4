"""A safety net under a learned rule: who makes the next step, and how it is made safe."""
