-- The requests that wrk sends, and its results as one line of JSON.
--
-- Arguments: MODE HEADER. MODE close: a new connection for each request; keep: it stays open.
-- HEADER none; each: a PROXY v1 header before every request (so: with close); once: before the
-- first request of each connection (wrk opens all of them at the start, and writes to all before
-- it reads). Every header names another port, as real clients have.
--
-- wrk calls request() once by itself, to see whether it is HTTP: that call gets no header.

local STRANGER, POD, FIRST_PORT, PORTS = "106.52.131.116", "10.9.1.1", 32768, 28000
local calls = 0

function init(args)
   local close, header = args[1] == "close", args[2]
   local plain = "GET / HTTP/1.1\r\nHost: pod\r\n" .. (close and "Connection: close\r\n" or "") .. "\r\n"
   local limit = header == "each" and math.huge or tonumber(args[3] or 0)
   if header == "none" then
      wrk.headers["Host"] = "pod"
      if close then wrk.headers["Connection"] = "close" end
      return
   end
   local prepared = {}
   for i = 0, PORTS - 1 do
      prepared[i] = string.format("PROXY TCP4 %s %s %d 80\r\n", STRANGER, POD, FIRST_PORT + i) .. plain
   end
   request = function()
      calls = calls + 1
      if calls == 1 or calls > limit + 1 then return plain end
      return prepared[calls % PORTS]
   end
end

function done(summary, latency, requests)
   local e = summary.errors
   io.write(string.format(
      '{"requests": %d, "seconds": %.6f, "failed": %d, "timeouts": %d, "worst_us": %d, "p50_us": %d, "p99_us": %d}\n',
      summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status, e.timeout,
      latency.max, latency:percentile(50), latency:percentile(99)))
end
