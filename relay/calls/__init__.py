"""REST calls: request bodies, attempts, the cache, and the response to the client."""
