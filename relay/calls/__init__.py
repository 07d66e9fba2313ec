"""REST calls: the body, the attempts, the cache, and the response on its way down."""
