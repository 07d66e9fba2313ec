-- As post.lua, with a pause before each request, so that many connections offer a given rate.
-- usage: wrk ... -- MILLISECONDS
wrk.method = "POST"
wrk.body = '{"model":"gpt","messages":[{"role":"user","content":"' .. string.rep("x", 640) .. '"}]}'
wrk.headers["Content-Type"] = "application/json"
local pause
function init(args) pause = tonumber(args[1]) end
function delay() return pause end
