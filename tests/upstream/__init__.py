"""Stand-in providers: real servers on loopback that keep what arrived and answer, or misbehave, as told."""
