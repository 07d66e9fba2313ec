"""The only package that opens outbound sockets."""
