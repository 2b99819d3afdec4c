-- wrk -s post.lua URL -- FILE NAME=VALUE ...: POST this file with these headers; the last line is the result as JSON.
-- per_s are requests that were answered with success.
function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method, wrk.body = "POST", file:read("*all")
  file:close()
  for i = 2, #args do
    local name, value = args[i]:match("^([^=]+)=(.*)$")
    wrk.headers[name] = value
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('{"per_s": %.3f, "p50_us": %d, "p99_us": %d, "bad": %d}\n',
    (summary.requests - errors.status) * 1e6 / summary.duration, latency:percentile(50), latency:percentile(99),
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
