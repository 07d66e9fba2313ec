"""Where state is kept: volatile state in memory or Redis. The only package that imports a database
driver.
"""
