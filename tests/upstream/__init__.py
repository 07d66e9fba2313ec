"""Stand-in providers: servers on loopback that record requests and respond as scripted."""
